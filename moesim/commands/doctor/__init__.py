"""Check the installation, its extras, GPUs and NICs, and a scenario if one is given."""

from moesim.commands.doctor.command import doctor

__all__ = ["doctor"]
