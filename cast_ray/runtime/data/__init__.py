"""Ray Data: datasets in the store, streams of training steps and of whole images, and their resources."""
