# SPDX-License-Identifier: Apache-2.0
"""The training prompts of the demo maps: templates, committed, reproducible from one seed.

Everything comes from this file and from the standard library of the Python that runs it (an
explicit list of modules, never ``Lib/test``). The prompts in ``examples/prompts/unseen.jsonl``,
which judge the maps, were written apart: other topics, other functions, other texts.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
import textwrap
from dataclasses import dataclass

TOPICS = """photosynthesis|the water cycle|volcanoes|the solar system|gravity|magnets|electric cars
solar panels|wind turbines|batteries|the internet|search engines|passwords|artificial intelligence
robots|3D printing|satellites|black holes|the Moon landing|dinosaurs|whales|elephants|honey badgers
penguins|spiders|ants|coral reefs|rainforests|deserts|earthquakes|hurricanes|clouds|rainbows|snow
the human heart|the immune system|sleep|vitamins|allergies|healthy breakfasts|drinking enough water
stretching|yoga|swimming|cycling|football|chess|board games|playing the guitar|learning the piano
jazz music|opera|painting with watercolours|photography|film editing|poetry|writing a novel|libraries
learning a new language|public speaking|time management|saving money|credit cards|paying taxes
starting a small business|remote work|job applications|resumes|meetings|e-mail etiquette|first aid
gardening|house plants|composting|baking bread|making soup|coffee|green tea|chocolate|spices
vegetarian cooking|camping|hiking in the mountains|road trips|train journeys|airports|Japan|Italy
Brazil|Egypt|ancient Rome|the Vikings|the Middle Ages|the Industrial Revolution|democracy|human rights
recycling|climate change|friendship|loneliness|stress|patience|courage|homework|school uniforms
kindergarten|moving to a new city|renting an apartment|buying a used car|weddings|winter clothes"""

CHAT_TEMPLATES = (
    "Explain {t} in simple terms.",
    "Write a short story about {t}.",
    "What are the advantages and disadvantages of {t}?",
    "Give me some tips about {t}.",
    "What is the most interesting fact about {t}?",
    "Write a poem about {t}.",
    "How would you explain {t} to a child?",
    "I know nothing about {t}. Where should I start?",
    "Write an introduction for an essay about {t}.",
    "What do beginners usually get wrong about {t}?",
    "Make a list of ten words that have to do with {t} and explain three of them.",
    "Why is {t} important?",
    "Write a dialogue between two friends who talk about {t}.",
    "Can you recommend a plan for a week that has to do with {t}?",
    "What questions should I ask an expert on {t}?",
    "Describe {t} to somebody who has never heard of it.",
    "What is the history of {t}?",
    "Write a letter to a friend about {t}.",
    "What will {t} look like in fifty years?",
    "Summarize what you know about {t} in one paragraph.",
    "Who should care about {t}, and why?",
    "Write a blog post about {t} with a catchy title.",
    "What are common myths about {t}?",
    "How does {t} affect everyday life?",
)

TASKS = """reverses a string|checks whether a number is prime|computes the factorial of a number
returns the n-th Fibonacci number|counts the words in a text|finds the largest number in a list
removes all spaces from a string|checks whether a string is a palindrome|sorts a list of dictionaries by a key
converts Celsius to Fahrenheit|computes the greatest common divisor of two numbers|flattens a nested list
counts how often each character appears in a string|reads a text file and returns its lines
downloads a web page|writes a dictionary to a JSON file|computes the area of a circle
finds the second largest number in a list|checks whether a year is a leap year|generates a random password
implements binary search|implements bubble sort|implements quicksort|implements a stack|implements a queue
implements a linked list|computes the sum of the digits of a number|transposes a matrix
multiplies two matrices|validates an e-mail address|parses a date|measures how long a function takes
capitalises the first letter of every word|splits a list into chunks|finds the common elements of two lists
converts a decimal number to binary|computes the distance between two points|draws a triangle of stars
simulates rolling two dice|checks whether brackets are balanced|encrypts a text with a Caesar cipher
finds the longest word in a sentence|replaces every vowel by a star|computes compound interest
lists all files in a folder|counts the lines of a file|zips two lists into a dictionary
retries a function three times|caches the results of a function|rotates a list by n positions"""

TASK_TEMPLATES = (
    "Write a Python function that {t}.",
    "How do I write a function in Python that {t}?",
    "Write a JavaScript function that {t}.",
    "Write a Python function that {t} and add a docstring and an example.",
    "Show me code that {t} and explain it line by line.",
    "Write a unit test for a Python function that {t}.",
    "Write a C function that {t}.",
    "Write a Java method that {t}.",
)

CONCEPTS = """recursion|a decorator in Python|a dictionary|a for loop|exception handling
object-oriented programming|inheritance|a lambda function|a regular expression|version control with git|unit testing
an API|a database index|a hash table|a binary tree|big O notation|a virtual environment|a context manager
garbage collection|a thread|a process|asynchronous programming|an HTTP request|JSON|a pointer in C
a Dockerfile|a Makefile|a shell pipeline|type hints|a dataclass|a closure|an iterator|CSS selectors
an SQL join|a foreign key|continuous integration|code review|debugging|logging|floating-point numbers"""

CONCEPT_TEMPLATES = (
    "What is {t}? Give a short example.",
    "Explain {t} to a beginner in programming.",
    "When should I use {t}, and when not?",
    "Write a short tutorial about {t}.",
    "What are common mistakes with {t}?",
)

CODE_TEMPLATES = (
    "What does this Python code do?\n\n```python\n{c}\n```",
    "Explain this function step by step:\n\n```python\n{c}\n```",
    "Write a unit test for this function:\n\n```python\n{c}\n```",
    "Is there a problem with this code?\n\n```python\n{c}\n```",
)

CODE_EDITS = (
    "Write a docstring for this function and return the whole function:\n\n```python\n{c}\n```",
    "Add type hints to this function:\n\n```python\n{c}\n```",
    "Rewrite this code so that it is easier to read:\n\n```python\n{c}\n```",
    "Add comments to this code and print all of it:\n\n```python\n{c}\n```",
    "Rename the variables in this code to something more telling:\n\n```python\n{c}\n```",
    "Add error handling to this function:\n\n```python\n{c}\n```",
    "Translate this Python code to JavaScript:\n\n```python\n{c}\n```",
)

TEXT_EDITS = (
    "Rewrite the following text in simple words:\n\n{p}",
    "Correct the mistakes in this text:\n\n{p}",
    "Make this text shorter:\n\n{p}",
    "Rewrite this text in a more formal tone:\n\n{p}",
    "Rewrite this text in a friendly tone:\n\n{p}",
    "Continue this text with one more paragraph:\n\n{p}",
    "Turn this text into a list of bullet points:\n\n{p}",
    "Write this text again in the past tense:\n\n{p}",
    "Give this text a title and repeat it in full:\n\n{p}",
    "Rewrite this as an e-mail to a colleague:\n\n{p}",
    "Summarize the following text:\n\n{p}",
)

PARAGRAPHS = """The meeting on Tuesday has been moved to Thursday because the big room are being painted. \
Please tell everybody in you're team, and bring the new numbers.
Our new washing machine is very quiet and it use less water than the old one. It was not cheap, but we hope \
that it will last for many years.
Last summer we drove to the coast with our grandparents. The car broke down twice, it rained every day, and \
still it was the best holiday we ever had.
Dear neighbours, on Saturday we celebrate our wedding in the garden. It may get loud. Come over and have a \
piece of cake if you like.
The small bakery at the corner open at five in the morning. By seven there is a long queue, and by nine the \
good bread is gone.
I am writing to complain about the bicycle that I bought in your shop. After one week the chain fell off, and \
after two weeks the brakes did not work any more.
Students who sleep less then six hours remember less of what they have learned. A short nap after lunch can \
help, but it do not replace a good night.
The robot picked up the broken cup, looked at it for a long time, and then put the pieces in the wrong box.
Our team have finished the first version of the app. Users can create an account, upload a picture and send \
it to friends. The next version will have a search.
She opened the window and listened. Somewhere down the street somebody was practising the trumpet, always the \
same four notes, always with the same mistake.
Mix the flour, the sugar and the butter, add one egg and knead the dough until it is smooth. Put it in the \
fridge for an hour, roll it out and bake it for twelve minutes.
The city wants to plant a thousand trees until 2030. Trees make the streets cooler in summer, they clean the \
air, and they give birds a home.
Hi Tom, cant come tonight, have a cold. Can we meet next week instead? Sorry!! Say hello to the others from me.
The first computers filled whole rooms and needed a team of engineers. Today a telephone is thousands of times \
faster and fits in a pocket.
Many people is afraid of flying although it is one of the safest way to travel. Knowing how a plane works can \
help against the fear.
The report shows that sales went up by four percent in March, fell in April because of the strike, and reached \
a new record in May.
A good password is long, it is used for one account only, and it is not the name of your dog.
The museum is closed on Mondays. Tickets cost twelve euros, children under ten pay nothing, and the guided tour \
starts at three o'clock.
He had promised to call her at noon. It was half past two, the phone lay silently on the table, and the soup \
was cold.
We are looking for a friendly person who speak two languages and likes to work with children. Experience is \
welcome but not necessary.
The river was higher then ever before. In the morning the water reached the bridge, and in the evening the fire \
brigade closed the road.
Regular exercise make you stronger, improves your mood and helps you to sleep. Start slowly, ten minutes a day \
are enough for the first week.
The plan has three parts. First we ask the customers what they need. Then we build a small prototype. At the \
end we decide together whether to go on.
My uncle keeps forty chickens, two goats and a very old donkey. Every morning the donkey waits at the gate until \
somebody brings a carrot."""

# Small, pure-Python, documented modules that every CPython 3.11 has.
_MODULES = """abc argparse ast base64 bisect bdb calendar cgi cmd code codeop collections colorsys
compileall configparser contextlib copy csv ctypes.util dataclasses datetime decimal difflib dis
doctest email.utils enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt
getpass gettext glob gzip hashlib heapq hmac html html.parser http.cookies imaplib imghdr inspect
io ipaddress json.decoder json.encoder keyword linecache locale logging mailbox mimetypes
multiprocessing.pool netrc ntpath nturl2path numbers opcode operator optparse os pathlib pdb pickle
pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr queue
quopri random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal smtplib
sndhdr socket socketserver statistics string stringprep subprocess symtable sysconfig tabnanny tarfile
telnetlib tempfile textwrap threading timeit token tokenize trace traceback types typing unittest.case
urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser xdrlib
xml.dom.minidom xml.etree.ElementTree zipapp zipfile zoneinfo"""


@dataclass(frozen=True)
class Prompt:
    """One training prompt; `id` is stable for a given Python version and seed."""

    id: str
    kind: str  # chat | code | editing
    text: str


def _entries(block: str) -> list[str]:
    return [entry.strip() for entry in block.replace("\n", "|").split("|") if entry.strip()]


def short_functions(min_chars: int = 120, max_chars: int = 520) -> list[str]:
    """Source of short top-level functions and methods of the listed modules, in a fixed order."""
    sources: list[str] = []
    seen: set[str] = set()
    for name in _MODULES.split():
        try:
            module = importlib.import_module(name)
        except ImportError:  # a distribution may leave some out
            continue
        owners = [module, *(c for _, c in inspect.getmembers(module, inspect.isclass))]
        for owner in owners:
            if getattr(owner, "__module__", name) != name:
                continue
            for _, function in inspect.getmembers(owner, inspect.isfunction):
                if function.__module__ != name:
                    continue
                try:
                    source = textwrap.dedent(inspect.getsource(function)).strip()
                except (OSError, TypeError):
                    continue
                if min_chars <= len(source) <= max_chars and source not in seen:
                    seen.add(source)
                    sources.append(source)
    return sources


def prose(min_chars: int = 160, max_chars: int = 480) -> list[str]:
    """Paragraphs of prose: ours, and those of ``pydoc_data.topics`` that are plain text."""
    from pydoc_data.topics import topics

    found = PARAGRAPHS.split("\n")
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            text = re.sub(r"\s+", " ", paragraph).strip()
            plain = not re.search(r"::|\*\*\*|___|>>>|\[|\|", text) and text[:1].isupper()
            if plain and min_chars <= len(text) <= max_chars and text.endswith("."):
                found.append(text)
    return list(dict.fromkeys(found))


def training_prompts(count: int, seed: int = 20261121) -> list[Prompt]:
    """`count` distinct prompts, two fifths chat, and three tenths each of code and editing.

    The first n prompts of a longer list are those of a shorter one, so a corpus can grow.
    """
    rng = random.Random(seed)
    functions, texts = short_functions(), prose()
    rng.shuffle(functions)
    half = len(functions) // 2
    paragraphs = PARAGRAPHS.split("\n")
    chat = [t.format(t=topic) for topic in _entries(TOPICS) for t in CHAT_TEMPLATES]
    tasks = [t.format(t=task) for task in _entries(TASKS) for t in TASK_TEMPLATES]
    tasks += [t.format(t=c) for c in _entries(CONCEPTS) for t in CONCEPT_TEMPLATES]
    reading = [rng.choice(CODE_TEMPLATES).format(c=c) for c in functions[:half]]
    own = [t.format(p=p) for p in paragraphs for t in TEXT_EDITS]
    docs = [rng.choice(TEXT_EDITS).format(p=p) for p in texts if p not in set(paragraphs)]
    recode = [rng.choice(CODE_EDITS).format(c=c) for c in functions[half:]]
    pools = {"chat": [chat], "code": [tasks, reading], "editing": [own, recode, docs]}
    for kind_pools in pools.values():
        for pool in kind_pools:
            rng.shuffle(pool)
    order = (
        "chat",
        "code",
        "editing",
        "chat",
        "code",
        "editing",
        "chat",
        "code",
        "editing",
        "chat",
    )
    taken = dict.fromkeys(pools, 0)
    prompts: list[Prompt] = []
    while len(prompts) < count:
        kind = order[len(prompts) % len(order)]
        number = taken[kind]
        kind_pools = [pool for pool in pools[kind] if pool]
        if not kind_pools:
            raise ValueError(f"only {len(prompts)} prompts: the templates for {kind} are used up")
        text = kind_pools[number % len(kind_pools)].pop()
        taken[kind] += 1
        prompts.append(Prompt(id=f"{kind}-{number:04d}", kind=kind, text=text))
    return prompts
