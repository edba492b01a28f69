"""On-disk formats of annotations, one file each."""
