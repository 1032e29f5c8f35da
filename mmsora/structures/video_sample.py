"""The annotation of one clip."""

from mmengine.structures import BaseDataElement

__all__ = ["OF_IMAGES", "VideoSample"]

# What may be known of a sample, and where that of the images beside its clip is.
OF_IMAGES = {
    "label": "image_labels",
    "text": "image_texts",
    "text_embedding": "image_text_embeddings",
    "latent": "image_latents",
    "image_embedding": "image_image_embeddings",
}


class VideoSample(BaseDataElement):
    """What is known of one clip besides its pixels.

    Fields that the toolbox reads, each where it is known:

    * ``index``: global number of the sample in its dataset, which all of its random numbers
      derive from; a dataset that counts epochs goes on counting beyond its length.
    * ``label``: class number.
    * ``text``: caption; ``text_embedding``: what an encoder made of it, (length, width).
    * ``latent``: what another VAE made of it.
    * ``image_embedding``: what an encoder of pictures made of its first frame.
    * ``path``: where it came from.
    * ``weight``: how much its loss counts, 1 unless said; 0 for what only keeps the place of a
      file that cannot be read.
    * ``num_images``: so many of the last frames are independent images, and no part of the clip;
      ``image_labels``, ``image_texts`` and so on, as in ``OF_IMAGES``, say of each what the fields
      above say of the clip.

    Any other field may be set and travels along.
    """
