"""kvote eval: tasks generated on the spot, asked of any model with any method, and written down sample by sample."""
