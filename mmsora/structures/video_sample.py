"""The annotation of one clip."""

from mmengine.structures import BaseDataElement

__all__ = ["VideoSample"]


class VideoSample(BaseDataElement):
    """What is known of one clip besides its pixels.

    Fields that the toolbox reads, each where it is known:

    * ``index``: global number of the sample in its dataset, which all of its random numbers
      derive from; a dataset that counts epochs goes on counting beyond its length.
    * ``label``: class number.
    * ``text``: caption.
    * ``path``: where it came from.
    * ``weight``: how much its loss counts, 1 unless said; 0 for what only keeps the place of a
      file that cannot be read.
    * ``num_images``: so many of the last frames are independent images, and no part of the clip;
      ``image_labels`` has their class numbers.

    Any other field may be set and travels along.
    """
