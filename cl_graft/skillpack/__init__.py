"""SkillPacks: a library of codecs, files, compression and grafting that knows no stream and no strategy."""
