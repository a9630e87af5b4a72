"""`from stages.predict import Segmenter`: the stable import path for users of a trained student."""

from stages.apply.predict import Segmenter

__all__ = ["Segmenter"]
