"""What runs stages: worker groups of Ray Train, training, labelling, evaluation and online teachers."""
