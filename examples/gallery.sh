#!/bin/sh
# Makes the pictures of the README from the sample photo: sh examples/gallery.sh [FOLDER]
set -eu
here=$(dirname "$0")
out=${1:-$here}
segcli segment "$here/china.jpg" -q -o "$out/" \
    -f overlay -f confidence --legend --contours --names --viridis
segcli segment "$here/china.jpg" -q -o "$out/china.cutout.png" -f cutout --classes building
