"""The digits autoencoder benchmark: the task, the optimizers with their grids, the tuning."""
