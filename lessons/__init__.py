"""Lesson notebooks, their sources, and what builds and checks them."""
