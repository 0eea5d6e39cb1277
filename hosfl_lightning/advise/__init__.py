"""What to train at the client, measured before training: a diagnosis in simulation, with backprop."""
