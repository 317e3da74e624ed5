import re

import pytest

from experiments import fits

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_command_says_what_fits_and_what_it_needs(capsys):
    arguments = ["digits_resnet8_bcn_ws", "--per-device-batch", "2", "--memory-gib", "1"]
    assert fits.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"micro-batch\s+of 2 fits", printed)
    # Parameters and momentum alone are 0.6 MiB; this network and two images need little more.
    assert 0 < int(re.search(r"2 │\s+(\d+) │", printed)[1]) < 20


def test_what_does_not_fit_is_an_error_in_one_line(capsys):
    arguments = ["digits_resnet8_bcn_ws", "--per-device-batch", "1", "--memory-gib", "0.0001"]
    assert fits.main(arguments) == 1
    assert "One size at least must fit" in capsys.readouterr().err
