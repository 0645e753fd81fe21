"""The version of the package."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("expunge")
except PackageNotFoundError:  # a checkout that is run without being installed
    VERSION = "0"
