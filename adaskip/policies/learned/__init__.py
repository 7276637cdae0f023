"""Learned routers: one small trained head per decoder layer."""
