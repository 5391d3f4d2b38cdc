"""What gpu_tests.py keeps of a test run."""

from pathlib import Path

from gpu_tests import read_report

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_right"/>
<testcase classname="tests.a" name="test_wrong[cuda]">
  <failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase classname="tests.a" name="test_broken"><error message="fixture fell over">trace</error></testcase>
<testcase classname="tests.b" name="test_elsewhere"><skipped message="no CUDA GPU"/></testcase>
</testsuite></testsuites>"""


def test_outcomes_are_counted_and_what_did_not_pass_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    found = read_report(tmp_path / "report.xml")
    assert found == {
        "counts": {"passed": 1, "failed": 2, "skipped": 1},
        "failed": {"tests.a::test_wrong[cuda]": "assert 1 == 2", "tests.a::test_broken": "fixture fell over"},
        "skipped": {"tests.b::test_elsewhere": "no CUDA GPU"},
    }
