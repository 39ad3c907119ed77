"""Suite files that are wrong: what replaces a part of a good one, and what is said."""

from __future__ import annotations

TARGETS = "targets = [0.5]"
WINDOW = 'texts = ["wikipedia"]\nwindow = 16'
TEXTS = '[evaluation]\ntexts = ["wikipedia"]\nwindow = 16\nwindows = 3'
TEAL = '[[methods]]\nname = "teal"'
LATENCY = "[evaluation]\ntexts = []\n[latency]\n"

# name: (part of tests/tiny.py's SUITE, what stands in its place, what the sentence has)
SUITES: dict[str, tuple[str, str, str]] = {
    "no TOML": (TARGETS, "targets = [0.5", "mine.toml is not TOML: "),
    "a key twice": (TARGETS, f"{TARGETS}\n{TARGETS}", "mine.toml is not TOML: Cannot overwrite a value"),
    "nested too deep": (TARGETS, f"targets = {'[' * 9000}{']' * 9000}", "mine.toml is not TOML: "),
    "an unknown key": (TARGETS, "targts = [0.5]", "unknown key 'targts'; allowed here: name, title"),
    "an unknown table": (TARGETS, f"{TARGETS}\n[evalution]\nwindow = 3", "unknown key 'evalution'; allowed here: name"),
    "an unknown key in a table": ("statistics_windows", "statistics_window", "unknown key 'calibration.statistics_win"),
    "an unknown key of a method": (
        TEAL,
        f"{TEAL}\ntarget = [0.5]",
        "unknown key 'methods.1.target'; allowed here: name",
    ),
    "no name": ('name = "mine"\n', "", "the key 'name' is missing"),
    "no targets": (TARGETS, "", "the key 'targets' is missing"),
    "a name that is a path": ('"mine"', '"../mine"', "name = '../mine'"),
    "a name that is none": ('"mine"', '""', "name = ''"),
    "a name that is a number": ('"mine"', "3", "name = 3: must be a valid string"),
    "a target of one": ("[0.5]", "[1.0]", "targets.0 = 1.0: must be less than 1"),
    "a negative target": ("[0.5]", "[-0.5]", "targets.0 = -0.5: must be greater than or equal to 0"),
    "a target of NaN": ("[0.5]", "[nan]", "targets.0 = nan: must be a finite number"),
    "an infinite target": ("[0.5]", "[inf]", "targets.0 = inf: must be a finite number"),
    "a target that is text": ("[0.5]", '["half"]', "targets.0 = 'half': must be a valid number"),
    "a target that is no list": ("[0.5]", "0.5", "targets = 0.5: must be a valid list"),
    "no target": ("[0.5]", "[]", "targets = []: List should have at least 1 item"),
    "a target twice": ("[0.5]", "[0.5, 0.5]", "targets: 0.5 stands there twice"),
    "a negative seed": (TARGETS, f"{TARGETS}\nseeds = [-1]", "seeds.0 = -1: must be greater than or equal to 0"),
    "a seed too large": (TARGETS, f"{TARGETS}\nseeds = [{2**63}]", f"seeds.0 = {2**63}: must be less than {2**63}"),
    "a seed that is a fraction": (TARGETS, f"{TARGETS}\nseeds = [0.5]", "seeds.0 = 0.5: must be a valid integer"),
    "a seed that is true": (TARGETS, f"{TARGETS}\nseeds = [true]", "seeds.0 = True: must be a valid integer"),
    "no seed": (TARGETS, f"{TARGETS}\nseeds = []", "seeds = []: List should have at least 1 item"),
    "an unknown dtype": (TARGETS, f'{TARGETS}\ndtype = "int8"', "dtype = 'int8': must be 'float32' or 'bfloat16'"),
    "no model": (TARGETS, f"{TARGETS}\nmodel = []", "model: [] names no model; allowed: one, or a list of some"),
    "a model twice": (TARGETS, f'{TARGETS}\nmodel = ["a", "a"]', "model: a stands there twice"),
    "a model that is a number": (TARGETS, f"{TARGETS}\nmodel = 3", "must be a valid string"),
    "an unknown text": (
        '["wikipedia"]',
        '["klingon"]',
        "evaluation.texts: 'klingon' is no known text; allowed: wikitext2, ",
    ),
    "a text twice": ('["wikipedia"]', '["papers", "papers"]', "evaluation.texts: papers stands there twice"),
    "nothing to measure": ('["wikipedia"]', "[]", "evaluation.texts = []: nothing is measured; allowed with a table"),
    "a test set to calibrate on": (
        "[calibration]",
        '[calibration]\ntext = "wikitext2"',
        "calibration.text: 'wikitext2' is no text to fit on (did you mean 'wikitext2-train'?); allowed: wikipedia",
    ),
    "a window too short": (WINDOW, WINDOW.replace("16", "1"), "evaluation.window = 1: must be greater than or equal"),
    "a window of NaN": (WINDOW, WINDOW.replace("16", "nan"), "evaluation.window = nan: must be a valid integer"),
    "no windows": ("windows = 3", "windows = 0", "evaluation.windows = 0: must be greater than or equal to 1"),
    "more scored than there is": (
        WINDOW,
        f"{WINDOW}\nscored = 16",
        "evaluation.scored = 16: must be less than the window",
    ),
    "a table that is a list": (TARGETS, f"{TARGETS}\ntokens = []", "tokens = []: must be a valid dictionary"),
    "an unknown policy": (
        TARGETS,
        f'{TARGETS}\n[tokens]\npolicy = "none"',
        "tokens.policy = 'none': must be 'all-but-",
    ),
    "a fraction of NaN": (TARGETS, f"{TARGETS}\n[tokens]\nfraction = nan", "tokens.fraction = nan: must be a finite"),
    "no sparse token": (TARGETS, f'{TARGETS}\n[tokens]\npolicy = "decode-only"', "takes a `prompt` here"),
    "a policy twice": (TEAL, f"{TEAL}\n[[policies]]\ntargets = [0.5]", "policies: all-but-first-1 stands there twice"),
    "a policy of no method": (
        TEAL,
        f"{TEAL}\n[[policies]]\nn = 3\ntargets = [0.5]\nmethods = []",
        "policies.0.methods = []",
    ),
    "a policy of an unknown method": (
        TEAL,
        f'{TEAL}\n[[policies]]\nn = 3\ntargets = [0.5]\nmethods = ["tea"]',
        "policies: no method 'tea' in the suite; allowed: dense, teal",
    ),
    "methods that are names": (TEAL, 'methods = ["teal"]', "unknown key 'methods.0.methods'; allowed here: name"),
    "a method twice": (TEAL, f"{TEAL}\n{TEAL}", "two methods are called 'teal': give one a label"),
    "an unknown method": ('"teal"', '"teel"', "unknown method 'teel' (did you mean 'teal'?); allowed: cats, "),
    "a wrapper of nothing": ('"teal"', '"spon"', "method 'spon' must be written spon(METHOD)"),
    "a wrapper that is not closed": ('"teal"', '"spon(teal"', "unknown method 'spon(teal'"),
    "wrappers without end": ('"teal"', f'"{"spon(" * 2000}teal{")" * 2000}"', "characters; allowed: 1000"),
    "an unknown parameter": (TEAL, f"{TEAL}\nparameters = {{ stepp = 1 }}", "has no parameter 'stepp'; allowed: topk"),
    "a parameter of NaN": (
        TEAL,
        f"{TEAL}\nparameters = {{ step = nan }}",
        "step must be above 0 and at most 0.25, got",
    ),
    "a parameter that is text": (TEAL, f'{TEAL}\nparameters = {{ windows = "x" }}', "windows = 'x': Input should be a"),
    "a seed among parameters": (TEAL, f"{TEAL}\nparameters = {{ seed = 1 }}", "a seed is given with `seeds`"),
    "parameters of what is not wrapped": (
        TEAL,
        f"{TEAL}\nparameters = {{}}\ninner = {{ step = 0.1 }}",
        "wraps nothing",
    ),
    "a method with no target": (TEAL, f"{TEAL}\ntargets = []", "methods.1.targets = []: List should have at least 1"),
    "a method with no seed": (TEAL, f"{TEAL}\nseeds = []", "methods.1.seeds = []: List should have at least 1"),
    "a label of two lines": (
        TEAL,
        f'{TEAL}\nlabel = "a\\nb"',
        "methods.1.label = 'a\\nb': String should match pattern",
    ),
    "an unknown reference": (
        TARGETS,
        f'{TARGETS}\nreference = "teall"',
        "no method 'teall' in the suite; allowed: dense",
    ),
    "no task": (TEXTS, f"{TEXTS}\n[tasks]\nnames = []", "tasks.names = []: List should have at least 1 item"),
    "too few items": (
        TEXTS,
        f'{TEXTS}\n[tasks]\nnames = ["piqa"]\nitems = 1',
        "tasks.items = 1: must be greater than or",
    ),
    "time and quality": (
        TEXTS,
        f"{TEXTS}\n[latency.cpu]\nmodels = ['tiny']",
        "a suite measures either time or quality",
    ),
    "time on no device": (TEXTS, f"{LATENCY}prompt = 8", "latency: nothing is timed; allowed with matrices or mo"),
    "time of nothing": (
        TEXTS,
        f"{LATENCY}[latency.cpu]\nthreads = [1]",
        "latency: nothing is timed; allowed with matrices",
    ),
    "no thread": (
        TEXTS,
        f"{LATENCY}[latency.cpu]\nmodels = ['tiny']\nthreads = [0]",
        "latency.cpu.threads.0 = 0: must be",
    ),
    "a matrix that is none": (
        TEXTS,
        f"{LATENCY}[latency.cpu]\nmatrices = ['axb']",
        "matrix 'axb': must be INPUTSxOUTPUTS, such as 4096x14336",
    ),
    "a published value of NaN": (
        TEAL,
        f"{TEAL}\n[[published]]\nvalue = nan\n"
        "model = 'm'\nmethod = 'm'\ntarget = 0.5\nmetric = 'x'\ntag = 'C'\nsource = 's'",
        "published.0.value = nan: must be a finite number",
    ),
}
