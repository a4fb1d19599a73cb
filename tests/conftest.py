"""Settings of the whole test suite."""

from __future__ import annotations

from hypothesis import settings

# A deadline measures the machine: 200 ms an example, Hypothesis' default, is missed now and then on one that is busy. The blob
# that is printed with a failure repeats it elsewhere.
settings.register_profile("kdray", deadline=None, print_blob=True)
settings.load_profile("kdray")
