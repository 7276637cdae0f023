"""Training the routers: objective, Lightning module, callbacks, data and tracking."""
