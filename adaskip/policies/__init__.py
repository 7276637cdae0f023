"""Policies without routers: what a learned router must beat at the same compute."""
