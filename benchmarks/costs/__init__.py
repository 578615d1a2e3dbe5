"""What a hypergradient costs: FLOPs, time, memory, and products with a Hessian."""
