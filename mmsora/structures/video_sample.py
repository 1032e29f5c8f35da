"""The annotation of one clip."""

from mmengine.structures import BaseDataElement

__all__ = ["VideoSample"]


class VideoSample(BaseDataElement):
    """What is known of one clip besides its pixels.

    Fields that the toolbox reads: ``index`` (global number of the sample in its dataset, which
    all of its random numbers derive from; a dataset that counts epochs goes on counting beyond
    its length), ``label`` (class number), ``path`` (where it came from). Any other field may be
    set and travels along.
    """
