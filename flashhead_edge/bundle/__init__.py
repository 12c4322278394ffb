"""A runtime, its wheels and a model in one archive, for a machine without a network: `bundle` writes it, its own `install.sh` installs it."""

from flashhead_edge.bundle.make import Bundled, bundle
from flashhead_edge.bundle.targets import TARGETS, Target, target_named

__all__ = ["TARGETS", "Bundled", "Target", "bundle", "target_named"]
