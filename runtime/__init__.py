"""The run itself, under any launcher: configuration, data, state, step, checkpoints, trainer."""
