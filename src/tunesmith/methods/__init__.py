"""Pure losses. A method turns a model and a batch into a sum of losses and a count; the loop divides."""
