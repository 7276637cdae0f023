"""Routers: pooled prompt features -> one keep logit per layer -> gates."""
