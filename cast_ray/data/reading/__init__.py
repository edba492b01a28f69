"""Listing, checking and decoding the images of a dataset, whatever its format."""
