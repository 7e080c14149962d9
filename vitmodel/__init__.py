"""Breast cancer scores from mammograms with a Vision Transformer written by hand. Research software, not a medical device."""

__version__ = "0.1.0"
