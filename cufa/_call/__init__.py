"""What a call is given: arrays of any framework, options, every check of them, and the facts that follow."""
