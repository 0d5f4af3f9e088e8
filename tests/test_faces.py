from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import flatminima


def test_what_the_library_shows_is_there_as_names_and_as_modules() -> None:
    assert flatminima.gramian.gram is flatminima.gram
    assert flatminima.theory.fia_criterion is flatminima.fia_criterion
    assert flatminima.sampling.draw_subsets(5, 5, 1, 0)
    assert {*flatminima.__all__, "errors", "gramian", "losses", "torch_compat"} <= set(dir(flatminima))


def test_a_name_that_is_not_there_is_refused_as_python_does_and_the_one_meant_is_known() -> None:
    with pytest.raises(AttributeError, match="module 'flatminima' has no attribute 'mesure'") as caught:
        _ = flatminima.mesure
    assert (caught.value.name, caught.value.obj) == ("mesure", flatminima)
    with pytest.raises(ImportError, match="cannot import name 'mesure' from 'flatminima'"):
        exec("from flatminima import mesure")


def test_a_fresh_process_imports_what_is_looked_at_when_it_is() -> None:
    code = (
        "import random, sys, flatminima as fm\n"
        "seeded = random.getstate()\n"
        "first = 'torch' in sys.modules\n"
        "from flatminima import measure\n"
        "names = {}\n"
        "exec('from flatminima import *', names)\n"
        "print([first, measure is fm.measures.measure, sorted(set(fm.__all__) - set(names)), fm.gramian.__name__])\n"
        "print(random.getstate() == seeded)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found, unmoved = shown.splitlines()
    assert ast.literal_eval(found) == [False, True, [], "flatminima.gramian"]
    assert unmoved == "True", "what was imported has drawn from Python's generator"
