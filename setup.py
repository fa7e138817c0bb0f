"""Package metadata, read from settings.ini so that nbdev and setuptools cannot disagree."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

def reqs(key):
    "The requirements listed under `key`, one per blank-separated word"
    return cfg.get(key, '').split()

status = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}[cfg['status']]

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=(here/'README.md').read_text(encoding='utf-8') if (here/'README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    project_urls={'Documentation': cfg['doc_host'] + cfg['doc_baseurl']},
    license='MIT',
    license_files=['LICENSE'],
    keywords=cfg['keywords'].split(),
    classifiers=[
        f'Development Status :: {status}',
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)),
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg['lib_name'], f"{cfg['lib_name']}.*"]),
    include_package_data=True,
    install_requires=reqs('requirements'),
    extras_require={extra: reqs(f'{extra}_requirements') for extra in ('dev', 'jax', 'docs', 'bench')},
    # Lets the documentation of another nbdev project link to this one's symbols.
    entry_points={'nbdev': [f"{cfg['lib_name']} = {cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
)
