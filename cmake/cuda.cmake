# The CUDA kernels as one shared library, where nvcc is found; without it fastsnn compiles them at first use by NVRTC.
#   FASTSNN_CUDA                 ON or OFF; default: whether nvcc is there
#   FASTSNN_CUDA_ARCHITECTURES   compute capabilities; the last one also as PTX, for devices to come
# Adds the target fastsnn_cuda, lib/_fastsnn_cuda.so. nvcc runs as a plain command, so that a project without a CUDA
# toolkit configures without one.
find_program(FASTSNN_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
if(FASTSNN_NVCC)
  set(FASTSNN_CUDA_FOUND ON)
else()
  set(FASTSNN_CUDA_FOUND OFF)
endif()
option(FASTSNN_CUDA "Build the CUDA kernels ahead" ${FASTSNN_CUDA_FOUND})
set(FASTSNN_CUDA_ARCHITECTURES "80;90;100" CACHE STRING "Compute capabilities to build the CUDA kernels for")

if(FASTSNN_CUDA)
  if(NOT FASTSNN_NVCC)
    message(FATAL_ERROR "FASTSNN_CUDA is ON and nvcc was not found. Put it on PATH, set CUDA_HOME, or pass -DFASTSNN_CUDA=OFF.")
  endif()
  set(FASTSNN_GENCODE)
  foreach(ARCHITECTURE ${FASTSNN_CUDA_ARCHITECTURES})
    list(APPEND FASTSNN_GENCODE -gencode arch=compute_${ARCHITECTURE},code=sm_${ARCHITECTURE})
    set(FASTSNN_LAST ${ARCHITECTURE})
  endforeach()
  list(APPEND FASTSNN_GENCODE -gencode arch=compute_${FASTSNN_LAST},code=compute_${FASTSNN_LAST})
  set(FASTSNN_CUDA_LIBRARY ${CMAKE_BINARY_DIR}/lib/_fastsnn_cuda.so)
  file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
  # Bits must equal the reference: no multiply-add contraction. Five objects, and in each (--threads 0) every
  # architecture: they compile side by side.
  set(FASTSNN_CUDA_OBJECTS)
  foreach(PART 0 1 2 3 4)
    set(OBJECT ${CMAKE_BINARY_DIR}/lif_cuda_${PART}.o)
    add_custom_command(
      OUTPUT ${OBJECT}
      COMMAND ${FASTSNN_NVCC} -O3 -std=c++17 --fmad=false --threads 0 ${FASTSNN_GENCODE} -ccbin ${CMAKE_CXX_COMPILER}
              -Xcompiler -fPIC,-fvisibility=hidden -DLIF_PART=${PART} -c -o ${OBJECT} ${CMAKE_SOURCE_DIR}/kernels/lif_cuda.cu
      DEPENDS kernels/lif_cuda.cu kernels/cuda_straight.h kernels/cuda_sums.h kernels/cuda_neurons.h kernels/cuda_memory.h
              kernels/lif.h kernels/lif.def kernels/problem.def
      WORKING_DIRECTORY ${CMAKE_SOURCE_DIR}
      COMMENT "Compiling the CUDA kernels, part ${PART} of 0 to 4, for ${FASTSNN_CUDA_ARCHITECTURES}"
      VERBATIM)
    list(APPEND FASTSNN_CUDA_OBJECTS ${OBJECT})
  endforeach()
  add_custom_command(
    OUTPUT ${FASTSNN_CUDA_LIBRARY}
    COMMAND ${FASTSNN_NVCC} -shared -cudart static ${FASTSNN_GENCODE} -ccbin ${CMAKE_CXX_COMPILER} -o ${FASTSNN_CUDA_LIBRARY} ${FASTSNN_CUDA_OBJECTS}
    DEPENDS ${FASTSNN_CUDA_OBJECTS}
    VERBATIM)
  add_custom_target(fastsnn_cuda ALL DEPENDS ${FASTSNN_CUDA_LIBRARY})
endif()
