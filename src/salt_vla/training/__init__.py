"""The training loop and what it is made of; every schedule is a function of the step."""
