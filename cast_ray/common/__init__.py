"""Tools without knowledge of the project: the registry of named parts, atomic writing, paths, text files."""
