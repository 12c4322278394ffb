"""Engines that FlashHead works inside of: transformers (`hf`)."""
