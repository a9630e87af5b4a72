"""`from stages.predict import Segmenter`: the one import path that is promised to users of a trained student."""

from stages.apply.predict import Segmenter

__all__ = ["Segmenter"]
