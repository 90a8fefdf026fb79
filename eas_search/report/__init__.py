"""Results as numbers (`front`), text (`labels`), plots (`figures`) and one offline page (`page`).

Everything here is fed with plain DataFrames and dicts: no model, no study and no storage is needed to draw a
result again.  Nothing is imported at this level, so that the numbers can be used without loading the plots.
"""
