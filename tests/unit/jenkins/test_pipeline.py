"""The Jenkinsfile and the job: what Jenkins would only say when it runs them."""

import re
from pathlib import Path

import pytest
from jinja2 import Environment, FileSystemLoader

from tests.e2e.jenkins.pipeline import PipelineError, Stage, load, parse, read, source, walk

ROOT = Path(__file__).parents[3]
JENKINSFILE = ROOT / "Jenkinsfile"
TEMPLATES = ROOT / "roles/jenkins/templates"


def flat(stages: tuple[Stage, ...]) -> list[Stage]:
    """Return all stages in the order in which they run."""
    return [each for stage in stages for each in [stage, *flat(stage.stages)]]


def job(url: str = "ssh://git@localhost/srv/git/winemon.git", data: str = "") -> str:
    """Return the Job DSL that the role writes."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), trim_blocks=True)  # noqa: S701 - Groovy, not HTML
    environment.filters["comment"] = lambda text, _: f"/* {text} */"
    return environment.get_template("etc/winemon/jenkins/jobs.groovy.j2").render(
        ansible_managed="managed",
        jenkins_retrain="H 4 * * 0",
        jenkins_retrain_data=data,
        jenkins_git_branch="main",
        _jenkins_git_url=url,
    )


def test_the_stages_are_make_verbs_in_their_order() -> None:
    commands = [stage.command for stage in flat(load(JENKINSFILE).stages) if stage.command]
    verbs = ["check", "train", "gate", "release", "publish", "deploy", "smoke", "loadtest"]
    assert commands == [f"make {verb}" for verb in verbs]


def test_make_knows_every_verb() -> None:
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = re.findall(r"sh 'make (\w+)'", JENKINSFILE.read_text())
    assert set(called) <= known


def test_only_what_follows_a_deployment_is_rolled_back() -> None:
    stages = load(JENKINSFILE).stages
    rolled_back = [
        stage.name
        for stage in flat(stages)
        if any(step.arguments == ("make rollback",) for steps in stage.post.values() for step in steps)
    ]
    assert rolled_back == [stages[-1].name]
    assert [step.arguments for step in stages[-1].post["unsuccessful"]] == [("make rollback",)]
    assert [stage.command for stage in stages[-1].stages] == ["make smoke", "make loadtest"]


def test_builds_end_run_one_at_a_time_and_are_discarded() -> None:
    pipeline = load(JENKINSFILE)
    assert {"timeout", "disableConcurrentBuilds", "buildDiscarder", "timestamps"} == set(pipeline.options)
    assert all(stage.timeout for stage in flat(pipeline.stages) if stage.command)


def test_every_report_is_kept_where_the_stage_that_writes_it_ends() -> None:
    kept = {
        stage.name: [(step.name, step.keywords) for step in stage.post.get("always", ())]
        for stage in flat(load(JENKINSFILE).stages)
    }
    for name, directory in [("Gate", "gate"), ("Load test", "loadtest")]:
        assert dict(kept[name]) == {
            "junit": {"testResults": f"build/{directory}/*.xml", "allowEmptyResults": True},
            "archiveArtifacts": {"artifacts": f"build/{directory}/**", "allowEmptyArchive": True},
        }


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("stages {", "stages", "no Groovy"),
        ("sh 'make gate'", "sh 'make gate", "no Groovy"),
        ("sh 'make gate'", 'sh "make ${params.VERB}"', "not a plain value"),
        ("sh 'make gate'", "sh 'make gate; true'", "exactly one sh 'make VERB'"),
        ("sh 'make gate'", "sh 'pytest'", "exactly one sh 'make VERB'"),
        ("sh 'make gate'", "sh 'make gate'; sh 'make train'", "exactly one sh 'make VERB'"),
        ("sh 'make gate'", "sh(script: 'make gate', returnStatus: true)", "exactly one sh 'make VERB'"),
        ("sh 'make gate'", "catchError { sh 'make gate' }", "exactly one sh 'make VERB'"),
        ("sh 'make rollback'", "sh 'rm -rf /'", "exactly one sh 'make VERB'"),
        ("timestamps()", "timestamp()", "options cannot have timestamp"),
        ("steps { sh 'make gate' }", "step { sh 'make gate' }", "a stage cannot have step"),
        ("steps { sh 'make gate' }", "", "either steps or stages"),
        ("unsuccessful {", "unsucessful {", "post cannot have unsucessful"),
        ("junit testResults", "junit testResult", "post cannot have junit"),
        ("agent any", "", "lacks {'agent'}"),
        ("agent any", "agent any\n  agent any", "cannot have agent"),
        ("pipeline {", "node {", "one pipeline"),
        ("pipeline {", "if (true) { }\npipeline {", "not a directive"),
    ],
)
def test_a_mistake_is_found(right: str, wrong: str, said: str) -> None:
    text = JENKINSFILE.read_text()
    assert right in text
    with pytest.raises(PipelineError, match=re.escape(said)):
        read(text.replace(right, wrong, 1))


def test_the_job_is_groovy_with_the_words_of_job_dsl() -> None:
    names = {
        source(node.named_children[0])
        for node in walk(parse(job()))
        if node.type in {"method_invocation", "juxt_function_call"}
        and node.named_children[0].type == "identifier"
    }
    assert names == {
        *("pipelineJob", "description", "parameters", "stringParam", "properties", "pipelineTriggers"),
        *("triggers", "pollSCM", "scmpoll_spec", "cron", "spec", "definition", "cpsScm", "scm", "git"),
        *("remote", "url", "branch", "extensions", "scriptPath", "lightweight", "queue"),
    }


def test_a_quote_in_a_setting_stays_in_its_text() -> None:
    texts = [
        source(node)
        for node in walk(parse(job(url="ssh://o'neill@host/a\\b", data="/srv/$DATA/wine's.csv")))
        if node.type == "character_literal"
    ]
    assert r"'ssh://o\'neill@host/a\\b'" in texts
    assert r"'/srv/$DATA/wine\'s.csv'" in texts
