"""Training: the state that a step works on, the step, and the loop around it."""
