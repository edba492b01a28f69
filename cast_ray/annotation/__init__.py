"""Labels on their way to an annotation tool and back: what is exported, each tool's files, what a person changed."""
