"""Training a Vision Transformer: schedules, augmentation, metrics, checkpoints, recipes; `cluster` drives them."""
