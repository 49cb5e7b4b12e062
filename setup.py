"Packaging: every field comes from settings.ini, the project's single source."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

extras = {key.removesuffix("_requirements"): shlex.split(value)
          for key, value in settings.items() if key.endswith("_requirements")}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    keywords=settings["keywords"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Education",
                 "Intended Audience :: Science/Research", "Programming Language :: Python :: 3"],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["mllm_nb", "mllm_nb.*"]),
    package_data={"mllm_nb": ["*.js", "*.css"]},
    install_requires=shlex.split(settings["requirements"]),
    extras_require=extras,
    entry_points={"console_scripts": shlex.split(settings["console_scripts"]),
                  "nbdev": ["mllm_nb=mllm_nb._modidx:d"]},
)
