# Finished cells in an archive, by which another machine goes on with a study: records and outcomes, without packs and caches.
# Sourced by the studies' make.sh, in the folder of the work.

# restore ARCHIVE: takes out what is in it, where nothing has been done yet
restore() {
  [[ -n $(ls -A) || ! -f $1 ]] || tar -xJf "$1"
}

# keep ARCHIVE FOLDER...: with KEEP=1 puts the finished cells and files of the folders that are there into it
keep() {
  local archive=$1 folder
  [[ -n ${KEEP:-} ]] || return 0
  shift
  for folder in "$@"; do
    [[ -d $folder ]] || continue
    find "$folder" -maxdepth 1 -name '*.json' # what tuning chose
    find "$folder" -name result.json -printf '%h\n'
  done | sort |
    tar -cJf "$archive" --exclude=packs --exclude=tracking --owner=0 --group=0 --mtime=@0 --files-from=-
}
