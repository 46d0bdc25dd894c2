"""moesim: simulate, place and tune mixture-of-experts deployments; everything is imported where it is used."""

__version__ = "0.1.0"
