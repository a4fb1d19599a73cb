"""Model folders: resolving, building, pruning, quantising and inspecting them."""
