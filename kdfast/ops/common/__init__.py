"""What the ops of several families share: gradients, closed forms on a CPU, and how a loss of rows is registered."""
