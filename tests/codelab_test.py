#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compare the codelab's two pages with gcloud, with the files that they name, and with each other.

    tests/codelab_test.py [-k NAME]    the standard library of Python 3.11 is enough

Each page is walked: one bash runs its ```bash blocks in order, with stubs instead of gcloud, curl,
docker, git and ./dev, and with `set -euo pipefail`, so that an undefined variable is an error. Then
the arguments that the stubs got are checked: each gcloud command is given to the installed gcloud,
which parses it and stops where it would need an account. Nothing here reaches a network.
"""
import concurrent.futures
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import unicodedata
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
sys.dont_write_bytecode = True
import sizes  # noqa: E402  docs/sizes.py

PAGES = {"en": ROOT / "docs/codelab.md", "vi": ROOT / "docs/codelab.vi.md"}
TOKEN = "hf_TokenOfTheWalk0123456789"  # must be in no argument list
PROJECT = "walk-project"
NO_ACCOUNT = "You do not currently have an active account selected"
ROLES = {"artifactregistry.writer", "logging.logWriter", "run.builder", "run.invoker",
         "secretmanager.secretAccessor", "storage.objectViewer"}
APIS = {f"{api}.googleapis.com" for api in ("run", "cloudbuild", "secretmanager", "artifactregistry")}
# Cloud Run's name of a GPU: the name in docs/sizes.py, and the least CPUs and GiB that it requires.
GPUS = {"nvidia-l4": ("L4", 4, 16), "nvidia-rtx-pro-6000": ("RTX PRO 6000", 20, 80)}

STUB = f"#!{sys.executable} -IS" + r'''
import json, os, re, shutil, sys
name, args = os.path.basename(sys.argv[0]), sys.argv[1:]
# Read stdin only for commands that read a pipe: the others have bash's own script as stdin.
piped = name == "envsubst" or any(a == "-" or a.endswith("=-") for a in args)
given = sys.stdin.read() if piped else ""
with open(os.environ["WALK_LOG"], "a") as log:
    log.write(json.dumps({"name": name, "args": args, "stdin": given, "cwd": os.getcwd()}) + "\n")
if name == "git" and args[0] == "clone":
    shutil.copytree(os.environ["WALK_TREE"], args[-1], symlinks=True)
elif name == "git":
    print("abc1234")
elif name == "gcloud" and args == ["config", "get", "project"]:
    print(os.environ["WALK_PROJECT"])
elif name == "gcloud" and args[:3] == ["secrets", "versions", "access"]:
    print(os.environ["WALK_TOKEN"], end="")
elif name == "envsubst":
    print(re.sub(r"\$\{(\w+)\}", lambda m: os.environ[m[1]], given), end="")
elif name == "curl":
    print("vllm:num_requests_running 0")
elif name == "dev" and args[0] == "fetch":
    snapshot = os.path.join(os.getcwd(), "hub", "snapshots", "c0ffee")
    os.makedirs(snapshot, exist_ok=True)
    open(os.path.join(snapshot, "config.json"), "w").close()
    print(snapshot)
'''
STUBBED = ("gcloud", "curl", "docker", "git", "envsubst")
REAL = ("sed", "cut", "grep", "mkdir", "basename")  # a page may use these and bash's built-ins


class Block:
    def __init__(self, language, line, lines):
        self.language, self.line, self.text = language, line, "\n".join(lines)

    def without_comments(self):
        return [line.rstrip() for line in self.text.split("\n") if not re.match(r"\s*#", line)]


class Page:
    def __init__(self, language):
        self.language, self.path = language, PAGES[language]
        self.text = self.path.read_text(encoding="utf-8")
        self.blocks, self.prose = [], []  # prose: (number, line) outside of blocks
        block = None
        for number, line in enumerate(self.text.split("\n"), 1):
            if line.startswith("```"):
                if block is None:
                    block = (line[3:].strip(), number, [])
                else:
                    self.blocks.append(Block(*block))
                    block = None
            elif block is not None:
                block[2].append(line)
            else:
                self.prose.append((number, line))
        if block is not None:
            raise AssertionError(f"{self.path.name}:{block[1]}: this block does not end")

    def bash(self):
        return [block for block in self.blocks if block.language == "bash"]

    def headings(self):
        found = [re.match(r"(#+) +([0-9.]*)", line) for _, line in self.prose]
        return [(len(m[1]), m[2].rstrip(".")) for m in found if m]

    def links(self):
        return [(n, m) for n, line in self.prose for m in re.findall(r"\]\(([^)]+)\)", line)]


class Walk:
    """Runs a page's commands; calls holds each call of a stub with its arguments."""

    def __init__(self, page, directory):
        self.page, self.directory = page, directory
        stubs, tree = directory / "stubs", directory / "tree"
        stubs.mkdir(parents=True)
        (tree / "docs").mkdir(parents=True)
        for name in (".env", "cloudbuild.yaml", "docs/service.yaml"):
            shutil.copy(ROOT / name, tree / name)
        for path in [*(stubs / name for name in STUBBED), tree / "dev"]:
            path.write_text(STUB)
            path.chmod(0o755)
        for name in REAL:
            (stubs / name).symlink_to(shutil.which(name))
        script = ["set -euo pipefail"]
        for block in page.bash():
            script += [f"echo '{page.path.name}:{block.line}' >&2", block.text]
        (directory / "script").write_text("\n".join(script) + "\n", encoding="utf-8")
        log = directory / "log"
        log.touch()
        self.result = subprocess.run(
            [shutil.which("bash"), str(directory / "script")], cwd=directory, input=TOKEN + "\n",
            text=True, capture_output=True, timeout=300, env={
                "PATH": str(stubs), "HOME": str(directory), "LANG": "C.UTF-8", "WALK_LOG": str(log),
                "WALK_TREE": str(tree), "WALK_PROJECT": PROJECT, "WALK_TOKEN": TOKEN})
        self.calls = [json.loads(line) for line in log.read_text().splitlines()]
        for call in self.calls:  # the two walks differ only in their directories
            call["same"] = [a.replace(str(directory), "DIR") for a in call["args"]]

    def gcloud(self, *words):
        """The arguments of those calls of gcloud that begin with these words."""
        return [c["args"] for c in self.calls
                if c["name"] == "gcloud" and c["args"][:len(words)] == list(words)]


def flags(args):
    """A command's --flag=value and --flag, as a dictionary."""
    return {m[1]: m[2] if m[2] is not None else True
            for m in (re.match(r"--([a-z-]+)(?:=(.*))?$", a, re.S) for a in args) if m}


def gcloud_env(directory, **more):
    directory.mkdir(parents=True, exist_ok=True)
    return {"PATH": os.environ["PATH"], "HOME": str(directory), "LANG": "C.UTF-8", "TERM": "dumb",
            "CLOUDSDK_CONFIG": str(directory / "config"), "CLOUDSDK_CORE_PROJECT": PROJECT,
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1", "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false", "CLOUDSDK_CORE_DISABLE_FILE_LOGGING": "1",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
            # Nothing listens there, so a request to the internet fails at once.
            "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", **more}


def run_gcloud(args, directory, stdin="", cwd=None, **more):
    return subprocess.run([shutil.which("gcloud"), *args], input=stdin, text=True, cwd=cwd,
                          capture_output=True, timeout=300, env=gcloud_env(directory, **more))


class CloudRun(http.server.BaseHTTPRequestHandler):
    """A stub of Cloud Run's API: it knows no service, and refuses to create one."""
    posted = []

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "POST":
            self.posted.append(json.loads(body))
        code, status = (404, "NOT_FOUND") if self.command == "GET" else (400, "INVALID_ARGUMENT")
        text = json.dumps({"error": {"code": code, "message": "stub", "status": status}}).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_PATCH = answer

    def log_message(self, *_):
        pass


class Codelab(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory(prefix="codelab-")
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.directory = Path(cls.temporary.name)
        cls.pages = {language: Page(language) for language in PAGES}
        cls.walks = {language: Walk(page, cls.directory / language)
                     for language, page in cls.pages.items()}

    def setUp(self):
        self.at = None  # the page that a failure is about
        self.maxDiff = 3000

    def each_page(self):
        for page in self.pages.values():
            self.at = page.path.name
            yield page
        self.at = None

    def each_walk(self):
        for page in self.each_page():
            yield self.walks[page.language]

    def _formatMessage(self, msg, standardMsg):
        return super()._formatMessage(f"{self.at}: {msg or ''}" if self.at else msg, standardMsg)

    # Both pages ----------------------------------------------------------------------------------

    def test_headings(self):
        en, vi = (page.headings() for page in self.pages.values())
        self.assertEqual(en, vi, "the two pages have other headings")
        last = [0, 0]
        for level, number in en[1:]:
            at = level - 2
            last = last[:at] + [last[at] + 1] + [0] * (1 - at)
            self.assertEqual(number, ".".join(map(str, last[:at + 1])), "numbers follow each other")

    def test_blocks_are_the_same(self):
        en, vi = (page.blocks for page in self.pages.values())
        self.assertEqual([b.language for b in en], [b.language for b in vi])
        for a, b in zip(en, vi):
            self.assertEqual(a.without_comments(), b.without_comments(),
                             f"codelab.md:{a.line} and codelab.vi.md:{b.line} differ")
        for block in en:
            self.assertIn(block.language, ("bash", "json"), f"codelab.md:{block.line}")

    def test_links(self):
        targets = {}
        for page in self.each_page():
            targets[page.language] = []
            for number, link in page.links():
                where = f"{page.path.name}:{number}: {link}"
                if re.match(r"[a-z]+:", link):
                    self.assertTrue(link.startswith("https://"), where)
                else:
                    self.assertTrue((page.path.parent / link).exists(), where + " is not there")
                if not link.startswith("codelab"):
                    targets[page.language].append(link)
        self.assertEqual(targets["en"], targets["vi"])

    def test_tables(self):
        for page in self.each_page():
            found = re.findall(r"<!-- docs/sizes.py (\w+) (\w+) -->\n((?:\|.*\n)+)", page.text)
            self.assertEqual([f[:2] for f in found],
                             [(page.language, w) for w in ("models", "gpus", "costs")])
            for language, which, rows in found:
                printed = subprocess.run([sys.executable, ROOT / "docs/sizes.py", language, which],
                                         capture_output=True, text=True, check=True).stdout
                self.assertEqual(rows, printed, f"docs/sizes.py {language} {which} prints another")

    def test_sizes_are_the_models(self):
        # Parameters of Hugging Face's checkpoints; then README.md's prediction for an L4.
        parameters = {"270M": 268_098_176, "1B": 999_885_952, "4B": 4_300_079_472,
                      "12B": 12_187_325_040, "27B": 27_432_406_640}
        self.assertEqual({m.name: m.parameters + m.vision for m in sizes.MODELS}, parameters)
        one = next(m for m in sizes.MODELS if m.name == "1B")
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        row = re.search(r"predicted for an L4.*\| ([\d,]+) / ([\d,]+) / ", readme)
        if not row:
            self.skipTest("README.md has no prediction for an L4")
        for batch, said in zip((1, 8), row.groups()):
            ours = sizes.speed(one, sizes.GPUS[0], batch)
            self.assertAlmostEqual(ours / float(said.replace(",", "")), 1, delta=0.02)

    def test_json(self):
        for page in self.each_page():
            (block,) = [b for b in page.blocks if b.language == "json"]
            answer = json.loads(block.text)
            self.assertEqual(list(answer), ["id", "object", "created", "model", "choices", "usage"])
            self.assertEqual(list(answer["choices"][0]), [
                "index", "text", "logprobs", "finish_reason", "stop_reason", "token_ids",
                "prompt_logprobs", "prompt_token_ids"])
            usage = answer["usage"]
            self.assertEqual(usage["total_tokens"],
                             usage["prompt_tokens"] + usage["completion_tokens"])

    def test_vietnamese_is_vietnamese(self):
        en, vi = self.pages.values()
        self.assertEqual(vi.text, unicodedata.normalize("NFC", vi.text), "accents are one character")
        known = {line.strip() for _, line in en.prose}
        for number, line in vi.prose:
            words = re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)
            if len(words) < 60 or line.startswith(("|", "<!--")):
                continue
            where = f"codelab.vi.md:{number}"
            self.assertFalse(line.strip() in known, where + " is the English line")
            marked = sum(ord(c) > 127 for c in words)
            self.assertGreater(marked, len(words) / 15, where + " lacks its accents: " + line)

    # Shell ---------------------------------------------------------------------------------------

    def test_bash_parses(self):
        for page in self.each_page():
            for block in page.bash():
                done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
                self.assertEqual((done.returncode, done.stderr), (0, ""),
                                 f"{page.path.name}:{block.line}")

    def test_shellcheck(self):
        if not shutil.which("shellcheck"):
            self.skipTest("shellcheck is not installed")
        for page in self.each_page():
            # All blocks are one script, so that later ones know the variables of earlier ones. The
            # values of .env are hidden: shellcheck asks for no quotes around a value that it knows.
            names = re.findall(r"(?m)^(\w+)=", (ROOT / ".env").read_text())
            script = [*(f"{name}=$1" for name in names), *(block.text for block in page.bash())]
            # 1091: `source .env` is not followed; 2034: an unused variable of .env; 2164: an
            # unchecked `cd`, which a reader types by hand
            done = subprocess.run(
                ["shellcheck", "--shell=bash", "--exclude=SC1091,SC2034,SC2164", "-"],
                input="\n".join(script), capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (0, ""))

    def test_walk(self):
        for walk in self.each_walk():
            self.assertEqual(walk.result.returncode, 0,
                             "the walk stopped after:\n" + walk.result.stderr[-2000:])
        en, vi = ([(c["name"], c["same"]) for c in w.calls] for w in self.walks.values())
        self.assertEqual(en, vi)

    def test_token(self):
        for walk in self.each_walk():
            for call in walk.calls:
                self.assertNotIn(TOKEN, " ".join(call["args"]), "the token is an argument")
            stored = [c["stdin"] for c in walk.calls if c["args"][:2] == ["secrets", "create"]]
            self.assertEqual(stored, [TOKEN], "Secret Manager gets the token, whole, and no newline")
            self.assertFalse(TOKEN in walk.result.stdout + walk.result.stderr, "the token is on screen")
            self.assertFalse("print-identity-token" in walk.page.text, "a token in curl's arguments")

    def test_names(self):
        env = subprocess.run(["bash", "-c", "set -a; source ./.env; env"], cwd=ROOT, text=True,
                             capture_output=True, env={"PATH": os.environ["PATH"]}).stdout
        env = dict(line.split("=", 1) for line in env.splitlines())
        # The names of Google's codelab, and what they mean there.
        self.assertEqual(env["MODEL_NAME"], "google/gemma-3-1b-it")
        self.assertEqual(env["MODEL_NAME"], env["MODEL_PROVIDER"] + "/" + env["MODEL_VARIANT"])
        self.assertEqual(env["SERVICE_NAME"], "gemma-3-1b-it-service")
        self.assertEqual(env["IMAGE_NAME"], "your_region-docker.pkg.dev/your_project_id/"
                         + env["AR_REPO_NAME"] + "/" + env["SERVICE_NAME"])
        self.assertEqual(env["SERVICE_ACC_EMAIL"],
                         env["SERVICE_ACC_NAME"] + "@your_project_id.iam.gserviceaccount.com")
        for variable in ("SERVICE_ACC_NAME", "BUILD_ACC_NAME"):
            longest = env[variable].replace("1b", "270m")
            self.assertLessEqual(len(longest), 30, f"an account's name has 30 characters: {longest}")
        for walk in self.each_walk():
            for call in walk.calls:
                said = " ".join(call["args"])
                self.assertNotIn("your_", said)
                if call["args"] != ["config", "set", "project", "your-project-id"]:
                    self.assertNotIn("your-", said)

    def test_dev_commands(self):
        usage = (ROOT / "dev").read_text(encoding="utf-8")
        for page in self.each_page():
            for command in re.findall(r"\./dev ([a-z]+)", page.text):
                self.assertTrue(re.search(rf"(?m)^# +\./dev {command}\b", usage),
                                f"dev's help has no ./dev {command}")

    def test_fields_of_the_log(self):
        log = (ROOT / "log.cpp").read_text(encoding="utf-8")
        for page in self.each_page():
            fields = set(re.findall(r"jsonPayload\.(\w+)", page.text))
            self.assertGreater(len(fields), 5)
            for field in fields:
                self.assertTrue(f'"{field}"' in log, f"log.cpp does not write {field}")

    # gcloud --------------------------------------------------------------------------------------

    def test_gcloud_accepts(self):
        if not shutil.which("gcloud"):
            self.skipTest("gcloud is not installed")
        calls = [c for c in self.walks["en"].calls if c["name"] == "gcloud"]
        self.assertGreater(len(calls), 30)
        home = self.directory / "gcloud"

        def parse(at):
            call = calls[at]
            return run_gcloud(call["args"], home / str(at), call["stdin"], call["cwd"])

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for call, done in zip(calls, pool.map(parse, range(len(calls)))):
                with self.subTest(command=" ".join(call["args"])):
                    refused = done.returncode != 0 and NO_ACCOUNT not in done.stderr
                    self.assertFalse(refused, done.stderr)
                    self.assertNotIn(call["args"][0], ("alpha", "beta"))

    def test_values_that_gcloud_takes_unseen(self):
        for walk in self.each_walk():
            for args in walk.gcloud("services", "enable"):
                self.assertEqual(set(args[2:]), APIS)
            for call in walk.calls:
                said = flags(call["args"])
                if "role" in said:
                    self.assertIn(said["role"].removeprefix("roles/"), ROLES)
                if "gpu-type" in said:
                    self.check_gpu(said)

    def check_gpu(self, said):
        name, cpus, memory = GPUS[said["gpu-type"]]
        self.assertGreaterEqual(int(said["cpu"]), cpus)
        self.assertGreaterEqual(int(said["memory"].removesuffix("Gi")), memory)
        self.assertIn("no-cpu-throttling", said, "a GPU is billed by instance")
        self.assertIn("no-allow-unauthenticated", said)
        gpu = next(g for g in sizes.GPUS if g.name == name)
        model = {"L4": "1B", "RTX PRO 6000": "27B"}[name]  # the largest that the page deploys there
        model = next(m for m in sizes.MODELS if m.name == model)
        self.assertLessEqual(int(said["concurrency"]), sizes.sequences(model, gpu))
        probe = dict(pair.split("=") for pair in said["startup-probe"].split(","))
        self.assertEqual(probe["httpGet.path"], "/health")
        self.assertLessEqual(int(probe["timeoutSeconds"]), int(probe["periodSeconds"]))
        most = 240 if name == "L4" else 600
        self.assertLessEqual(int(probe["periodSeconds"]) * int(probe["failureThreshold"]), most)
        self.assertEqual(int(probe.get("initialDelaySeconds", 0)), 0, "a delay makes all starts wait")

    def test_accounts(self):
        for walk in self.each_walk():
            roles = {}
            for call in walk.calls:
                said = flags(call["args"])
                if "member" in said and any("add-iam-policy-binding" in a for a in call["args"]):
                    account = said["member"].removeprefix("serviceAccount:").split("@")[0]
                    roles.setdefault(account, set()).add(said["role"].removeprefix("roles/"))
            service, build = "gemma-3-1b-it-service-sa", "gemma-3-1b-it-service-build"
            larger = "gemma-3-27b-it-service-sa"  # step 12.4, after steps 5 to 7 with its name
            self.assertEqual(roles[service], {"storage.objectViewer"}, "of the bucket of models alone")
            self.assertLessEqual({"secretmanager.secretAccessor", "artifactregistry.writer",
                                  "logging.logWriter", "storage.objectViewer"}, roles[build])
            self.assertEqual(set(roles), {service, build})
            for args in walk.gcloud("builds", "submit"):
                self.assertIn(build + "@", flags(args)["service-account"])
            for args in walk.gcloud("run", "deploy"):
                account = flags(args).get("service-account", service).split("@")[0]
                self.assertIn(account, (service, larger))

    def test_clean_up(self):
        for walk in self.each_walk():
            made, gone = set(), set()
            for kind in (("iam", "service-accounts"), ("artifacts", "repositories"), ("secrets",),
                         ("storage", "buckets"), ("run",)):
                for verb, names in (("create", made), ("deploy", made), ("delete", gone)):
                    for args in walk.gcloud(*kind, verb):
                        names.add(args[len(kind) + 1].split("@")[0])
            gone |= {args[3] for args in walk.gcloud("run", "services", "delete")}
            gone |= {args[-1] for args in walk.gcloud("storage", "rm")}
            made = {re.sub("27b", "1b", name) for name in made}  # step 12.4 repeats steps
            self.assertEqual(made - gone, set(), "the page makes it and never deletes it")

    # Files ---------------------------------------------------------------------------------------

    def test_cloudbuild(self):
        text = (ROOT / "cloudbuild.yaml").read_text()
        code = re.sub(r"(?m)(^|\s)#.*$", "", text)
        used = set(re.findall(r"\$\{(_\w+)\}", code))
        defaults = set(re.findall(r"(?m)^  (_\w+):", code))
        self.assertEqual(used, defaults, "a substitution without a default, or one without a use")
        for needed in ("DOCKER_BUILDKIT=1", "secretEnv: [HF_TOKEN]", "id=hf_token,env=HF_TOKEN"):
            self.assertIn(needed, code)
        arguments = re.findall(r"--build-arg=(\w+)=", code)
        self.assertFalse([a for a in arguments if "TOKEN" in a], "a build argument stays in the image")
        for walk in self.each_walk():
            submits = walk.gcloud("builds", "submit")
            self.assertEqual(len(submits), 2)
            for args in submits:
                given = flags(args)["substitutions"].split(",")
                self.assertLessEqual({pair.split("=")[0] for pair in given}, defaults)
        if not (ROOT / "Dockerfile").exists():
            self.skipTest("there is no Dockerfile to hold the build arguments against")
        dockerfile = (ROOT / "Dockerfile").read_text()
        for name in arguments:
            self.assertTrue(re.search(rf"(?m)^ARG {name}\b", dockerfile), f"no ARG {name} there")
        self.assertTrue("id=hf_token" in dockerfile)

    def test_service_yaml(self):
        """`services replace` sends Cloud Run the same request as `run deploy`, field by field."""
        if not shutil.which("gcloud"):
            self.skipTest("gcloud is not installed")
        walk = self.walks["en"]
        deploy = next(c for c in walk.calls if c["args"][:2] == ["run", "deploy"])
        replace = next(c for c in walk.calls if c["args"][:3] == ["run", "services", "replace"])
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), CloudRun)
        self.addCleanup(server.server_close)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.shutdown)
        key = self.directory / "key"
        key.write_text("no real token")
        services = []
        for call in (deploy, replace):
            CloudRun.posted.clear()
            # gcloud puts the region before the host's name, so the stub acts as its proxy.
            done = run_gcloud(
                call["args"], self.directory / "api", call["stdin"], call["cwd"],
                HTTP_PROXY=f"http://127.0.0.1:{server.server_port}",
                CLOUDSDK_AUTH_ACCESS_TOKEN_FILE=str(key),
                CLOUDSDK_API_ENDPOINT_OVERRIDES_RUN="http://run.invalid/",
                CLOUDSDK_API_ENDPOINT_OVERRIDES_SERVICEUSAGE="http://usage.invalid/")
            self.assertEqual(len(CloudRun.posted), 1, done.stderr)
            services.append(plain(CloudRun.posted[0]))
        self.assertEqual(*services, "the flags of step 7.1, and docs/service.yaml")


def plain(service):
    """A service without the fields that gcloud adds by itself."""
    def walk(value):
        if isinstance(value, dict):
            kept = {k: walk(v) for k, v in value.items()
                    if not k.startswith(("run.googleapis.com/client-", "client.knative.dev/"))}
            return {k: v for k, v in kept.items() if v not in ({}, "", None)}
        if isinstance(value, list):
            return [walk(v) for v in value]
        return value.lower() if value in ("True", "False") else value

    service.pop("status", None)
    return walk(service)


if __name__ == "__main__":
    unittest.main(verbosity=2)
