"""The tables and figures of docs/results.md, from summaries of studies in docs/results.

    python -m benchmarks.results --collect=runs/scarcity \
        --study=configs/studies/scarcity.py --processor='2 cores of an AMD EPYC'
    make results

The first command reads the predictions of a study's runs and writes `docs/results/scarcity.json`.
The second writes, beside every such file, a page of tables and a figure for each data set, and the
guard's record over all studies, so that no number is copied by hand. A test compares them with the
summaries.
"""
