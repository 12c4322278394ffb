"""Passes over the body's graph: each module has one subject, each function changes a model in place."""
