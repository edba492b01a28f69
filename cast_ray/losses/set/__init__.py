"""The set loss of Mask2Former: matching of queries to instances, and the terms of the pairs."""
