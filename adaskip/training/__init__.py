"""Training: objective, Lightning module, callbacks, data and tracking."""
