"""The fixture of all tests of launch scripts."""

from tests.helpers.launch_scripts import repository as repository
