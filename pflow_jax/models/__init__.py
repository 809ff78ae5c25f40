"""Networks (Flax linen) behind `apply({"params": params}, x, t, cond)`."""
