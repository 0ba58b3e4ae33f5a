"""What every test begins with."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def heard_log(caplog):
    """The host's log at its level, whatever a script of an earlier test has set (`caplog`)."""
    logging.getLogger().setLevel(logging.INFO)
